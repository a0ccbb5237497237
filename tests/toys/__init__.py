"""A representation and what else lies outside the product: modules of a user, found by their dotted paths."""
