//! The agent's unix socket: what `status` and `point` ask of a running agent.
