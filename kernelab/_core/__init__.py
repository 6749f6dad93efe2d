"""What every op stands on: the backend registry, op definition, specifications, errors, the native loader."""
