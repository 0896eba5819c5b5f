"""subjects3d: a rendered multi-view world in which every factor is known."""
