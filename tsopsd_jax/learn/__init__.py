"""update : TrainState, Batch -> TrainState."""
