"""The typed client of the query service. Needs only grpcio and the stubs."""
