"""Sockets, processes and signals: this package runs the app under gunicorn or waitress, and knows no model."""
