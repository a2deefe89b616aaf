// Who may talk NBD to us, and how: certificates, and which listeners need them.

package control

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// Files of a directory with certificates, named as QEMU, libnbd and nbdkit name
// them.
const (
	caCert     = "ca-cert.pem"
	serverCert = "server-cert.pem"
	serverKey  = "server-key.pem"
)

// loadTLS reads the server's certificate and key and the authority that clients'
// certificates must be signed by; nil where dir is empty.
func loadTLS(dir string) (*tls.Config, error) {
	if dir == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, serverCert), filepath.Join(dir, serverKey))
	if err != nil {
		return nil, fmt.Errorf("load certificate of the server: %w", err)
	}
	path := filepath.Join(dir, caCert)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load certificate authority: %w", err)
	}
	clients := x509.NewCertPool()
	if !clients.AppendCertsFromPEM(text) {
		return nil, refuse(syscall.EINVAL, "load certificate authority: there is no certificate in %s", path)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    clients,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS12,
	}, nil
}

// plaintext says whether clients of l may do without TLS: those of this machine
// may, others where the user says so.
func (s *service) plaintext(l net.Listener) bool {
	return s.set.allowPlaintext || !isRemote(l.Addr())
}

// isRemote says whether other machines may reach a socket with the address a.
func isRemote(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return ok && !t.IP.IsLoopback()
}
