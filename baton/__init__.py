"""The ground and the public face: types, errors, configuration, generated stubs, client."""
