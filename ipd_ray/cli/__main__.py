"""`python -m ipd_ray.cli`, as jobs call it."""

from ipd_ray.cli import main

if __name__ == "__main__":
    main()
