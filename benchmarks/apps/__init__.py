"""The reference servers that are not a program of their own. Each reads MODEL_FOLDER and PORT from the environment."""
