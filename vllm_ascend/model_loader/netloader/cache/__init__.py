"""The weights of a host, held by a process of their own, so that they outlive the engines that use them."""
