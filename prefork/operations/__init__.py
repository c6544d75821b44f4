"""How a running pool is seen and steered: the control socket, and the client that asks it."""
