// Sockets that we listen on: unix ones, TCP on loopback, and those that the
// service manager or libnbd passes in.

package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
)

const (
	controlSocket = "control.sock"
	nbdSocket     = "nbd.sock"

	nbdPort = "10809" // registered with IANA

	// maxSocketPath is the longest path of a unix socket, in bytes: sun_path
	// without its closing zero, unix(7).
	maxSocketPath = 107
)

// listenNBD opens the listening socket that uri names: unix://PATH or
// tcp://HOST:PORT. Beyond loopback it listens only if remote is set.
func listenNBD(ctx context.Context, uri string, remote bool) (net.Listener, error) {
	scheme, rest, _ := strings.Cut(uri, "://")
	switch {
	case scheme == "unix" && rest != "":
		return listenUnix(ctx, rest)
	case scheme == "tcp" && rest != "":
		return listenTCP(ctx, rest, remote)
	}
	return nil, refuse(syscall.EINVAL, "listen on %q: it is neither unix://PATH nor tcp://HOST:PORT", clip(uri))
}

// listenUnix opens a socket at path that only our user can connect to. A
// socket there that nobody listens on, left by a killed process, is replaced;
// anything else is not.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, refuse(syscall.EINVAL, "listen on %s: a socket's path has at most %d bytes", path, maxSocketPath)
	}
	if err := clearSocket(ctx, path); err != nil {
		return nil, err
	}
	var c net.ListenConfig
	l, err := c.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, plain(err))
	}
	// The umask of the daemon has kept others out since it was bound.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("close socket to others: %w", err)
	}
	return l, nil
}

// clearSocket removes the socket at path if nobody listens on it.
func clearSocket(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at socket: %w", err)
	case st.Mode()&fs.ModeSocket == 0:
		return refuse(syscall.EEXIST, "listen on %s: there is something else than a socket", path)
	}
	d := net.Dialer{Timeout: time.Second}
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return refuse(syscall.EBUSY, "listen on %s: the socket is in use", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

// listenTCP opens a TCP socket at addr, HOST:PORT or HOST, every address of
// which must be a loopback one unless remote is set.
func listenTCP(ctx context.Context, addr string, remote bool) (net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		host, port = strings.Trim(addr, "[]"), nbdPort
	}
	ips := []net.IPAddr{{IP: net.IPv6unspecified}} // what no host means
	if host != "" {
		if ips, err = net.DefaultResolver.LookupIPAddr(ctx, host); err != nil {
			return nil, fmt.Errorf("listen on tcp://%s: %w", addr, err)
		}
	}
	for _, ip := range ips {
		if !remote && !ip.IP.IsLoopback() {
			return nil, errPlaintext(addr)
		}
	}
	var c net.ListenConfig
	at := ips[0].String()
	if host == "" {
		at = "" // every address of either family
	}
	l, err := c.Listen(ctx, "tcp", net.JoinHostPort(at, port))
	if err != nil {
		return nil, fmt.Errorf("listen on tcp://%s: %w", addr, plain(err))
	}
	return l, nil
}

func errPlaintext(addr string) error {
	return refuse(syscall.EPERM, "listen on tcp://%s: other machines are served only with --tls-certs, or with --allow-plaintext", addr)
}

// plain takes off what net adds around an error: it names the address again.
func plain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// passedSockets are the listening sockets that were passed in (LISTEN_FDS), as
// systemd and libnbd do. Nil if there are none.
func passedSockets() ([]net.Listener, error) {
	var found []net.Listener
	for _, f := range activation.Files(true) {
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("use socket passed in as %s: %w", f.Name(), err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it belongs to who made it
		}
		found = append(found, l)
	}
	return found, nil
}

// exportURI is the NBD URI of an export on a socket with the address a, whose
// clients must use TLS if tls is set.
func exportURI(a net.Addr, export string, tls bool) string {
	if a.Network() != "unix" && tls {
		return "nbds://" + a.String() + "/" + export
	}
	if a.Network() != "unix" {
		return "nbd://" + a.String() + "/" + export
	}
	// A slash may stand in a query, and people read it more easily so.
	path := strings.ReplaceAll(url.QueryEscape(a.String()), "%2F", "/")
	return "nbd+unix:///" + export + "?socket=" + strings.ReplaceAll(path, "+", "%20")
}
