"""The launchers, on a machine without a cloud: fake programs stand first on the path."""
