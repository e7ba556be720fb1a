"""Package metadata and dependency ranges. The exact versions the tests ran with are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="ipd_ray",
    version="0.1.0",
    description="Offline RL that plans: MPC imagination in learned world models, distilled into a policy, on Ray",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["ipd_ray", "ipd_ray.*"]),
    package_data={"ipd_ray": ["py.typed", "presets/*.yaml", "report/**/*.html"]},
    install_requires=[
        "aiohttp>=3.9",
        "gymnasium[classic-control]>=1.0",
        "h5py>=3.8",
        "matplotlib>=3.8",
        "minari[hdf5,hf]>=0.5.3",
        "numpy>=2.0",
        "packaging>=23.0",
        "optuna>=4.0",
        "pyarrow>=20.0",
        "pydantic>=2.9",
        "PyYAML>=6.0",
        # `default` brings the dashboard: `ray job` needs it, and so does Train inside Tune, which asks its State API
        # to free the CPUs of a stopped trial; without it a sweep hangs. Not `rllib`: it pins gymnasium.
        "ray[default,tune,train]>=2.60",
        "rich>=13.0",
        "safetensors>=0.4.3",
        "torch>=2.6",
        "typer>=0.12",
        "wandb>=0.18",
    ],
    extras_require={
        "mujoco": ["gymnasium[mujoco]>=1.0"],
        "tensorboard": ["tensorboard>=2.16"],
        "bench": ["scipy>=1.15"],
        "dev": [
            # An S3-compatible server on loopback.
            "flask>=3.0",
            "flask-cors>=5.0",
            "moto[s3]>=5.0",
            "import-linter>=2.0",
            "jsonschema>=4.18",
            "mypy>=1.11",
            "pytest>=8.0,<9.2",  # from 9.2 on pytest-xdist (3.8) spreads its groups: pytest-xdist issue 1386
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "types-PyYAML>=6.0",
        ],
    },
    entry_points={"console_scripts": ["ipd-ray = ipd_ray.cli:main"]},
)
