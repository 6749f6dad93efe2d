"""One folder a paper: `kernelab list` names them, `kernelab run <paper>` runs one."""
