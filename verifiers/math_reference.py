def verify(response, ground_truth): raise NotImplementedError
