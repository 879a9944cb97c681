#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for a farm over TCP with TLS: clients with a certificate reach their
# disks, others are refused.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires certtool --version
"$NBDKIT" --dump-config | grep -qx tls=yes || skip "this nbdkit has no TLS"

# Somebody may have NBD's port, which the recipe uses.
port=$(py <<'END'
s = socket.socket()
s.bind(("localhost", 0))
print(s.getsockname()[1])
END
)
adapt ()
{
    echo "${1//10809/$port}"
}

fresh
run <<'END'
mkdir -p ca server client
END
run <<'END'
printf '%s\n' 'cn = "disks"' ca cert_signing_key >ca/info
END
run <<'END'
certtool --generate-privkey --outfile ca/key.pem
END
run <<'END'
certtool --generate-self-signed --template ca/info --load-privkey ca/key.pem \
    --outfile ca/cert.pem
END
run <<'END'
for who in server client; do \
    cp ca/cert.pem $who/ca-cert.pem; \
    printf '%s\n' 'cn = "localhost"' 'dns_name = "localhost"' tls_www_$who >$who/info; \
    certtool --generate-privkey --outfile $who/$who-key.pem; \
    certtool --generate-certificate --template $who/info \
        --load-privkey $who/$who-key.pem --outfile $who/$who-cert.pem \
        --load-ca-certificate ca/cert.pem --load-ca-privkey ca/key.pem; \
    done
END
run <<'END'
nbdkit --port=10809 --tls=require --tls-certificates=$PWD/server --tls-verify-peer \
    --filter=cow file golden.img cow-load=diffs/ cow-save=diffs/
END
run <<'END'
nbdinfo 'nbds://localhost:10809/web1?tls-certificates=client'
END
run <<'END'
qemu-system-x86_64 -m 1G \
    -object tls-creds-x509,id=tls,endpoint=client,dir=client \
    -blockdev driver=nbd,node-name=disk,export=web1,tls-creds=tls,server.type=inet,server.host=localhost,server.port=10809 \
    -device virtio-blk,drive=disk
END

# To write, a client needs a certificate of this CA.
write ()
{
    qemu-io --object "tls-creds-x509,id=tls,endpoint=client,dir=$1" --image-opts \
        -c 'write -P 7 0 64k' "driver=raw,file.driver=nbd,file.export=web1,file.tls-creds=tls,file.server.type=inet,file.server.host=localhost,file.server.port=$port"
}
write client
cp -r client stranger
certtool --generate-self-signed --template client/info \
    --load-privkey client/client-key.pem --outfile stranger/client-cert.pem 2>/dev/null
! write stranger >strange 2>&1 || die "any certificate will do"
! nbdinfo "nbd://localhost:$port/web1" >strange 2>&1 || die "it goes without TLS"
stop_server
qemu-io -r -c 'read -P 7 0 64k' diffs/web1.qcow2 | grep '^read 65536/65536' >/dev/null ||
    die "what was written is not in the diff"
