"""A training loop of one's own in twenty lines, for those who want to change it: python examples/own_loop.py [OUT]"""

import sys

import torch

import rwkv_peft as rp

BASE = "src/rwkv_peft/assets/tiny/model.pth"
OUT = sys.argv[1] if len(sys.argv) > 1 else "runs/own/adapter"

model = rp.load_model(BASE)  # the version and every size come from the file
tokenizer = rp.Tokenizer.byte()
rp.attach_adapter(model, rp.AdapterConfig(peft="bone", rank=16), train_parts=["ln"]).train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-3)

tokens = torch.tensor([tokenizer.encode("User: Who is there?\n\nAssistant: Only the wind.")])
for step in range(20):
    logits, state = model(tokens[:, :-1])  # state: hand it on to go on reading
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:2}  loss {loss.item():.4f}")

rp.save_adapter(model, OUT)
prompt = "User: Who is there?\n\nAssistant:"
print("".join(rp.generate(model.eval(), tokenizer, prompt, max_tokens=20, temperature=0)))
