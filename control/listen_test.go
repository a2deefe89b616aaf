package control

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestListenUnix(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, path string)
		err     error // nil: we listen
	}{
		{"nothing there", func(*testing.T, string) {}, nil},
		{"socket of a killed process", func(t *testing.T, path string) { leave(t, path).Close() }, nil},
		{"socket in use", func(t *testing.T, path string) {
			l := leave(t, path)
			t.Cleanup(func() { l.Close() })
		}, syscall.EBUSY},
		{"file", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, syscall.EEXIST},
		{"directory", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, syscall.EEXIST},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			tc.prepare(t, path)
			l, err := listenUnix(t.Context(), path)
			if !errors.Is(err, tc.err) {
				t.Errorf("listen on %s\n got %v\nwant %v", path, err, tc.err)
			}
			if err != nil {
				return
			}
			defer l.Close()
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := st.Mode().Perm(); got != 0o600 {
				t.Errorf("mode of the socket\n got %04o\nwant 0600", got)
			}
		})
	}
}

// leave listens on path and leaves the socket there when closed, as a process
// does that is killed.
func leave(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return l
}

func TestListenNBD(t *testing.T) {
	for _, tc := range []struct {
		name, uri string
		err       string // "" where we listen
		remote    bool
	}{
		{name: "TCP on loopback", uri: "tcp://127.0.0.1:0"},
		{name: "TCP on loopback by name", uri: "tcp://localhost:0"},
		{name: "TCP on loopback, IPv6", uri: "tcp://[::1]:0"},
		{name: "all addresses with TLS", uri: "tcp://0.0.0.0:0", remote: true},
		{name: "no host with TLS", uri: "tcp://:0", remote: true},
		{"all addresses", "tcp://0.0.0.0:0", "listen on tcp://0.0.0.0:0: other machines are served only with --tls-certs, or with --allow-plaintext", false},
		{"no host", "tcp://:0", "listen on tcp://:0: other machines are served only with --tls-certs, or with --allow-plaintext", false},
		{"all addresses, IPv6", "tcp://[::]:0", "listen on tcp://[::]:0: other machines are served only with --tls-certs, or with --allow-plaintext", false},
		{"bad port", "tcp://127.0.0.1:nbdx", "listen on tcp://127.0.0.1:nbdx: lookup tcp/nbdx: unknown port", false},
		{"no scheme", "/run/nbd.sock", `listen on "/run/nbd.sock": it is neither unix://PATH nor tcp://HOST:PORT`, false},
		{"no path", "unix://", `listen on "unix://": it is neither unix://PATH nor tcp://HOST:PORT`, false},
		{"long path", "unix:///" + strings.Repeat("x", 200), "listen on /" + strings.Repeat("x", 200) + ": a socket's path has at most 107 bytes", false},
		{"no directory", "unix:///nonexistent/s", "listen on /nonexistent/s: bind: no such file or directory", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, err := listenNBD(t.Context(), tc.uri, tc.remote)
			if err == nil {
				l.Close()
			}
			if tc.err != "" {
				wantError(t, "listen on "+tc.uri, err, tc.err)
			} else if err != nil && !errors.Is(err, syscall.EADDRNOTAVAIL) { // a machine without IPv6
				t.Error(err)
			}
		})
	}
}

func TestExportURI(t *testing.T) {
	for _, tc := range []struct {
		name string
		addr net.Addr
		want string
		tls  bool
	}{
		{"unix", &net.UnixAddr{Net: "unix", Name: "/run/blksnapd/nbd.sock"}, "nbd+unix:///vda@nightly?socket=/run/blksnapd/nbd.sock", false},
		{"odd path", &net.UnixAddr{Net: "unix", Name: "/a b/c&d+e?f#g%h"}, "nbd+unix:///vda@nightly?socket=/a%20b/c%26d%2Be%3Ff%23g%25h", false},
		{"TCP", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}, "nbd://127.0.0.1:10809/vda@nightly", false},
		{"TLS", &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 10809}, "nbds://10.0.0.1:10809/vda@nightly", true},
		{"TCP, IPv6", &net.TCPAddr{IP: net.IPv6loopback, Port: 1}, "nbd://[::1]:1/vda@nightly", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := exportURI(tc.addr, "vda@nightly", tc.tls); got != tc.want {
				t.Errorf("URI on %v\n got %s\nwant %s", tc.addr, got, tc.want)
			}
		})
	}
}
