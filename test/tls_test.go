// NBD over TLS, with certificates of both sides.

package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// certificates makes a directory with an authority and certificates of a server
// and a client, named as QEMU, libnbd and nbdkit name them.
func certificates(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	ca, caKey := certificate(t, dir, "ca", nil, nil)
	certificate(t, dir, "server", ca, caKey)
	certificate(t, dir, "client", ca, caKey)
	return dir
}

func certificate(t *testing.T, dir, name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if ca == nil {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
		ca, caKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + "-cert.pem": {Type: "CERTIFICATE", Bytes: der},
		name + "-key.pem":  {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c, key
}

// TestTLS serves all addresses: there, clients must use TLS and have a
// certificate.
func TestTLS(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo", "nbdcopy", "qemu-img")
	certs := certificates(t)
	dir := scratch(t)
	socket := filepath.Join(dir, "own.sock")
	d, origin := serveOrigin(t, 4*miB, "--tls-certs", certs, "--listen", "tcp://0.0.0.0:0", "--listen", "unix://"+socket)
	port := portOf(t, d.uris[0])

	secure := "nbds://localhost:" + port + "/vda"
	withCert := secure + "?tls-certificates=" + certs
	if got := strings.TrimSpace(run(t, "nbdinfo", "--size", withCert)); got != "4194304" {
		t.Errorf("size over TLS: got %q, want 4194304", got)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, "nbdcopy", withCert, copied)
	run(t, "cmp", copied, origin)
	run(t, "qemu-img", "info", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+certs,
		"--image-opts", "driver=nbd,host=localhost,port="+port+",export=vda,tls-creds=t")

	for what, uri := range map[string]string{
		"without TLS":           "nbd://localhost:" + port + "/vda",
		"without a certificate": secure,
	} {
		if r := end(t, exec.Command("nbdinfo", "--size", uri)); r.status == 0 {
			t.Errorf("a client %s was served", what)
		}
	}
	// On this machine's own socket TLS is offered, not required.
	run(t, "nbdinfo", "--size", "nbd+unix:///vda?socket="+socket)
}

func portOf(t *testing.T, line string) string {
	t.Helper()
	_, rest, _ := strings.Cut(line, "nbds://")
	host, _, _ := strings.Cut(rest, "/")
	_, port, err := net.SplitHostPort(host)
	if err != nil {
		t.Fatalf("no address of TLS clients in %q: %v", line, err)
	}
	return port
}

func TestTLSRefusals(t *testing.T) {
	needRoot(t)
	empty := t.TempDir()
	noCA := certificates(t)
	if err := os.WriteFile(filepath.Join(noCA, "ca-cert.pem"), []byte("none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"other machines in plain text", []string{"--listen", "tcp://0.0.0.0:0"}, "only with --tls-certs, or with --allow-plaintext"},
		{"directory without certificates", []string{"--tls-certs", empty}, "load certificate of the server"},
		{"authority that is none", []string{"--tls-certs", noCA}, "there is no certificate in"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := scratch(t)
			refuse(t, refusal{args: append(tc.args, makeOrigin(t, dir, "vda", miB)), status: 1, want: tc.want})
		})
	}
}
