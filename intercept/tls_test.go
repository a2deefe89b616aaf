package intercept

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority makes certificates, into files named as libnbd and QEMU want them.
type authority struct {
	dir  string
	pool *x509.CertPool
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir(), pool: x509.NewCertPool()}
	a.issue(t, "ca", nil)
	a.pool.AddCert(a.cert)
	return a
}

// issue makes a certificate for name and its key: ca, server or client.
func (a *authority) issue(t *testing.T, name string, serial *big.Int) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if serial == nil {
		serial = big.NewInt(time.Now().UnixNano())
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.cert, a.key
	if name == "ca" {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if name == "ca" {
		a.key = key
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + "-cert.pem": {Type: "CERTIFICATE", Bytes: der}, name + "-key.pem": {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(filepath.Join(a.dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serverConfig wants a certificate of a client, too.
func (a *authority) serverConfig(t *testing.T) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{a.issue(t, "server", nil)},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: a.pool,
	}
}

// startTLSServer serves exports on TCP, for clients that must use TLS.
func startTLSServer(t *testing.T, a *authority, exports Exports) (*Server, net.Addr) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(Options{Exports: exports, TLS: a.serverConfig(t)})
	serve(t, s, l, s.ServeTLS)
	return s, l.Addr()
}

// startTLS upgrades the client's connection.
func (c *client) startTLS(config *tls.Config) error {
	c.t.Helper()
	c.wantFinal(NBD_OPT_STARTTLS, nil, NBD_REP_ACK)
	conn := tls.Client(c.conn, config)
	c.conn, c.in = conn, bufio.NewReader(conn)
	return conn.HandshakeContext(soon(c.t))
}

func (a *authority) clientConfig(t *testing.T) *tls.Config {
	return &tls.Config{RootCAs: a.pool, ServerName: "localhost", Certificates: []tls.Certificate{a.issue(t, "client", nil)}}
}

// TestForcedTLS checks section "FORCEDTLS mode".
func TestForcedTLS(t *testing.T) {
	a := newAuthority(t)
	dev := newMemory(8 << 20)
	exports := newShelf(map[string]Device{"disk": dev})
	opened := false
	exports.opening = func(string) error { opened = true; return nil }
	s, addr := startTLSServer(t, a, exports)

	c := dial(t, addr)
	for id, data := range map[uint32][]byte{
		NBD_OPT_LIST: nil, NBD_OPT_INFO: infoData("disk"), NBD_OPT_GO: infoData("disk"), NBD_OPT_STRUCTURED_REPLY: nil,
		NBD_OPT_EXTENDED_HEADERS: nil, NBD_OPT_LIST_META_CONTEXT: metaData("disk"), 77: nil, 78: make([]byte, maxOption+1),
	} {
		replies := c.option(id, data)
		if len(replies) != 1 || replies[0].typ != NBD_REP_ERR_TLS_REQD {
			t.Errorf("option %d before TLS\n got %v\nwant only %#x", id, replies, NBD_REP_ERR_TLS_REQD)
		}
	}
	if opened {
		t.Error("an export was opened before TLS")
	}
	if err := c.startTLS(a.clientConfig(t)); err != nil {
		t.Fatalf("TLS handshake: %v", err)
	}
	c.wantFinal(NBD_OPT_STARTTLS, nil, NBD_REP_ERR_INVALID)
	c.begin(structured, "disk", "base:allocation")

	data := bytes.Repeat([]byte("abcdefg"), 1<<20)
	c.want(request{typ: NBD_CMD_WRITE, off: 5, n: uint64(len(data))}, data, 0)
	if x := c.want(request{typ: NBD_CMD_READ, off: 5, n: uint64(len(data))}, nil, 0); !bytes.Equal(x.data, data) {
		t.Error("what was read over TLS is not what was written")
	}
	if got := s.Clients(); len(got) != 1 || !strings.Contains(got[0].Peer, "CN=client") {
		t.Errorf("clients\n got %v\nwant one with CN=client", got)
	}
	c.disconnect() // wants EOF: TLS was closed in order
}

func TestForcedTLSWithoutFixedNewstyle(t *testing.T) {
	_, addr := startTLSServer(t, newAuthority(t), newShelf(map[string]Device{"disk": newMemory(4096)}))
	for _, flags := range []uint32{0, NBD_FLAG_C_FIXED_NEWSTYLE} {
		c := dialRaw(t, addr)
		c.greet(flags)
		c.sendOption(NBD_OPT_EXPORT_NAME, 4, []byte("disk"))
		c.wantEnd()
	}
	c := dial(t, addr)
	c.wantFinal(NBD_OPT_ABORT, nil, NBD_REP_ACK)
	c.wantEnd()
}

// TestBadCertificates has clients that the server must not accept.
func TestBadCertificates(t *testing.T) {
	a := newAuthority(t)
	_, addr := startTLSServer(t, a, newShelf(map[string]Device{"disk": newMemory(4096)}))
	stranger := newAuthority(t).clientConfig(t)
	stranger.RootCAs = a.pool
	for name, config := range map[string]*tls.Config{
		"no certificate":            {RootCAs: a.pool, ServerName: "localhost"},
		"of another authority":      stranger,
		"TLS older than 1.2":        {RootCAs: a.pool, ServerName: "localhost", MaxVersion: tls.VersionTLS11},
		"does not trust the server": {ServerName: "localhost"},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, addr)
			if err := c.startTLS(config); err == nil {
				// With TLS 1.3 the client learns it at its next read.
				c.sendOption(NBD_OPT_LIST, 0, nil)
				c.wantEnd()
			}
		})
	}
}

// TestPlaintextBeforeTLS sends an option together with STARTTLS: it must not be
// taken for one that came through TLS.
func TestPlaintextBeforeTLS(t *testing.T) {
	a := newAuthority(t)
	_, addr := startTLSServer(t, a, newShelf(map[string]Device{"disk": newMemory(4096)}))
	c := dial(t, addr)
	both := append([]byte("IHAVEOPT"), 0, 0, 0, byte(NBD_OPT_STARTTLS), 0, 0, 0, 0)
	both = append(both, "IHAVEOPT"...)
	both = append(both, 0, 0, 0, byte(NBD_OPT_LIST), 0, 0, 0, 0)
	c.write(both)
	if r := c.optionReplies(NBD_OPT_STARTTLS); r[0].typ != NBD_REP_ACK {
		t.Fatalf("reply to STARTTLS: %#x", r[0].typ)
	}
	conn := tls.Client(c.conn, a.clientConfig(t))
	if err := conn.HandshakeContext(soon(t)); err == nil {
		t.Error("TLS began although plain text came before it")
	}
}

// TestTLSForgets negotiates before and after STARTTLS on a server where TLS is
// offered: nothing of before counts.
func TestTLSForgets(t *testing.T) {
	a := newAuthority(t)
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": newMemory(4096)}), TLS: a.serverConfig(t)})
	c := dial(t, addr)
	c.wantFinal(NBD_OPT_EXTENDED_HEADERS, nil, NBD_REP_ACK)
	c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ACK)
	c.wantFinal(NBD_OPT_STARTTLS, []byte("x"), NBD_REP_ERR_INVALID)
	if err := c.startTLS(a.clientConfig(t)); err != nil {
		t.Fatalf("TLS handshake: %v", err)
	}
	c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"), NBD_REP_ERR_INVALID)
	c.begin(simple, "disk")
	c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
	c.want(request{typ: NBD_CMD_BLOCK_STATUS, n: 512}, nil, NBD_EINVAL)

	// Without TLS it goes, too.
	connect(t, addr, structured, "disk").disconnect()
}

func TestShutdownOverTLS(t *testing.T) {
	a := newAuthority(t)
	dev, entered, release := gated("write")
	s, addr := startTLSServer(t, a, newShelf(map[string]Device{"disk": dev}))
	c := dial(t, addr)
	if err := c.startTLS(a.clientConfig(t)); err != nil {
		t.Fatalf("TLS handshake: %v", err)
	}
	c.begin(structured, "disk")
	x := c.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096))
	<-entered
	stopped := make(chan error)
	go func() { stopped <- s.Shutdown(soon(t)) }()
	for !s.stopping.Load() {
		time.Sleep(time.Millisecond)
	}
	c.want(request{typ: NBD_CMD_READ, n: 512}, nil, NBD_ESHUTDOWN)
	close(release)
	if <-x.done; x.err != nil || x.errno != 0 {
		t.Errorf("write in flight: %d, %v", x.errno, x.err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if <-c.ended; !errors.Is(c.err, io.EOF) {
		t.Errorf("end of the connection\n got %v\nwant EOF", c.err)
	}
}

func TestServeTLSNeedsCertificate(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := NewServer(Options{Exports: newShelf(nil)}).ServeTLS(context.Background(), l); err == nil {
		t.Error("ServeTLS without a certificate returned nil")
	}
	if _, err := l.Accept(); err == nil {
		t.Error("the listener is still open")
	}
}
