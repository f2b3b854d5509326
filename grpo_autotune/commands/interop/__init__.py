"""The commands `import` and `export`, for configurations and logs of other frameworks."""
