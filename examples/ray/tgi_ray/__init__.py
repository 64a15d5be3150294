"""tgi-gateway as a Ray Serve application: replicas that are whole servers, and requests that follow their prefixes."""
