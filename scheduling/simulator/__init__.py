"""A discrete-event cluster that drives the very schedulers of the workers with a cost model."""
