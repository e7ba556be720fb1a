"""The method on a Ray cluster: the only place that imports ray. Its modules are imported inside functions only.

cluster: joining one, and what it can give. pool: actors for steps and shards. distill: Ray Train for step 5.
engine: the three of them behind `ipd_ray.engine.Engine`. nodes: asking each node. jobs: runs submitted to a cluster;
credentials: what such a job is handed.
"""
