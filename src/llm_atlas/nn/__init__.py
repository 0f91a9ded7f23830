"""Parts of a network: functions first, modules only where weights must live."""
