"""All figures. The only room that imports matplotlib."""
