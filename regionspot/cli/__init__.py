"""The commands, one file each: `build_parser()` without heavy imports, `main(argv=None) -> int`."""
