"""Generate with a running gateway by the huggingface_hub package, in TGI's own way and as a chat.

pip install huggingface_hub
python huggingface_client.py http://127.0.0.1:3000 "What is the capital of France?"
"""

import os
import sys

from huggingface_hub import InferenceClient

url, question = sys.argv[1:3]
client = InferenceClient(base_url=url, token=os.environ.get("API_KEY"))

for token in client.text_generation("Once upon a time", max_new_tokens=20, stream=True, details=True):
    print(token.token.text, end="", flush=True)
print()

answer = client.chat_completion([{"role": "user", "content": question}], max_tokens=60, temperature=0)
print(answer.choices[0].message.content)
