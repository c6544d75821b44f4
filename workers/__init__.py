"""What runs in a child. Imported as `prefork.workers`, never as `workers`: that name belongs to applications."""

if __name__ != "prefork.workers":
    raise ImportError("import prefork.workers; the name 'workers' is not prefork's")
