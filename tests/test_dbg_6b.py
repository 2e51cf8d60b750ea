import os, subprocess, sys, re
import pytest
from test_hub import *
SRC = '''
import sys
from timm_multiexit.hub import push_folder, fetch_files, plan_push
folder, repo = sys.argv[1:]
try:
    r = push_folder(folder, repo); print(r)
    print(push_folder(folder, repo))
    s = fetch_files(repo, ['config.json', 'model.safetensors'])
    print(s, {c.action for c in plan_push(folder, repo).changes})
    print(open(s.folder/'model.safetensors','rb').read() == open(folder+'/model.safetensors','rb').read())
except Exception as e:
    print(type(e), e); c=e.__cause__ 
    while c: print('  <-', type(c).__mro__, str(c)[:300]); c=c.__cause__ or c.__context__
'''
@pytest.mark.parametrize('fail', [None, ('xet-write-token', 403), ('xet-write-token', 500), ('/xorbs/', 403), ('/shards', 500), ('/reconstructions', 500), ('/_xorb', 500)])
def test_x(hub, folder, fail):
    if fail: hub.fail_next = [fail]*200
    env = {k:v for k,v in os.environ.items() if k != 'HF_HUB_DISABLE_XET'} | {'HF_XET_XORB_COMPRESSION_POLICY': 'none'}
    import time; t=time.time()
    r = subprocess.run([sys.executable, '-c', SRC, folder, REPO], env=env, capture_output=True, text=True, timeout=200)
    print('=====', fail, round(time.time()-t,1)); print(r.stdout, r.stderr[-600:])
    print([(e.method,e.path[:60],e.status) for e in hub.log if 'xorb' in e.path or '_lfs' in e.path][:6])
