"""One screen per task: joins widgets to state, decides nothing."""
