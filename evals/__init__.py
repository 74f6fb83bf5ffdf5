"""POPE, CHAIR and MME: scoring, building, and the runner that compares settings under one decoding."""
