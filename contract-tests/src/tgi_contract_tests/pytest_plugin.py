"""The pytest plug-in of the contract."""
