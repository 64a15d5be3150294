"""Chat with a running gateway by the openai package.

pip install openai
python openai_chat.py http://127.0.0.1:3000 "What is the capital of France?"
"""

import os
import sys

from openai import OpenAI

url, question = sys.argv[1:3]
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))

stream = client.chat.completions.create(
    model="tgi",
    messages=[{"role": "user", "content": question}],
    max_tokens=60,
    temperature=0,
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
