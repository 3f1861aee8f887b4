"""The verbs under the algorithms: start the world, load, shard, pack, step, checkpoint, export, log."""
