"""The files that ``underpaint plugins new`` writes, as Jinja templates."""
