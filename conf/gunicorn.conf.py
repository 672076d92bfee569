"""gunicorn -c conf/gunicorn.conf.py 'embedpool.server:wsgi()'

Everything comes from config.yml (EMBEDPOOL_CONFIG names it, else .config/config.yml).
Add gunicorn's own settings below.
"""

from embedpool.serve.gunicorn_settings import gunicorn_settings

globals().update(gunicorn_settings())
