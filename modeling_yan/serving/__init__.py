"""An OpenAI-compatible server on an engine that batches requests, runs the replicas and restarts them.

`requests` reads and checks, `writing` generates a batch of texts, `answers` has OpenAI's shapes, `routes` joins them.
The engine is LitServe in `server`, Ray Serve in `ray_app`.
"""
