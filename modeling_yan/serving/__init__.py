"""An OpenAI-compatible server on LitServe, which batches requests, runs the replicas and restarts them.

`requests` reads and checks, `writing` writes a batch of texts, `answers` has OpenAI's shapes, `server` joins them.
"""
