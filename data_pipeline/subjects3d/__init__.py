"""subjects3d: a rendered multi-view world whose factors are all known."""
