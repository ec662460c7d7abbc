"""How settings are read: strict YAML, strict types, errors that name the key."""
