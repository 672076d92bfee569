"""Beside the road: config.yml and pool.yml, checked and frozen."""
