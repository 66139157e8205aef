"""The analyses of `tsopsd analyse`: each module has `add(parser)`, and `run(args)` that returns (JSON object,
figure)."""
