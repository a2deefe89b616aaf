package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"blksnap/cow"
	"blksnap/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newTestDaemon returns a daemon with devices of 1 MiB and a snapstore in
// memory. Nothing but its methods leads to it.
func newTestDaemon(t *testing.T, devices ...string) *Daemon {
	t.Helper()
	return newTestDaemonOver(t, "", devices...)
}

// newTestDaemonOver is newTestDaemon with a state directory.
func newTestDaemonOver(t *testing.T, state string, devices ...string) *Daemon {
	t.Helper()
	part, err := store.OpenMem(8 << 20)
	if err != nil {
		t.Fatal(err)
	}
	pool := store.NewPool(part)
	cat, _, err := cow.OpenCatalogue("", state)
	if err != nil {
		t.Fatal(err)
	}
	d := newDaemon("0.0.0-test", slog.New(slog.DiscardHandler), cat, pool, func(export string) string { return "nbd:" + export })
	close(d.complete)
	t.Cleanup(func() {
		if !d.isStopping() {
			d.stop()
		}
		if err := d.closeDevices(); err != nil {
			t.Errorf("close the devices: %v", err)
		}
		if err := errors.Join(pool.Close(), cat.Close()); err != nil {
			t.Errorf("close the snapstore and the catalogue: %v", err)
		}
	})
	for _, name := range devices {
		if _, err := d.addDevice(t.Context(), DeviceRequest{Name: name, Origin: makeOrigin(t, 1<<20)}, true); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// makeOrigin makes a sparse file of size bytes and returns its path.
func makeOrigin(t *testing.T, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "*.img")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// serveTest serves d's control socket and returns a client of it.
func serveTest(t *testing.T, d *Daemon) *Client {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := listenUnix(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(ctx, d)
	served := make(chan error, 1)
	go func() { served <- serveControl(s, l) }()
	t.Cleanup(func() {
		cancel()
		if err := s.Shutdown(context.Background()); err != nil {
			t.Errorf("shut the control socket down: %v", err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return NewClient(path)
}

// write writes text to a device at off.
func write(t *testing.T, d *Daemon, device, text string, off int64) {
	t.Helper()
	dev, err := d.device(device)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Write([]byte(text), off, false); err != nil {
		t.Fatal(err)
	}
}

// take takes a snapshot of all devices.
func take(t *testing.T, d *Daemon, name string) {
	t.Helper()
	if _, err := d.take(SnapshotRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
}

// collect returns what a sequence of values and errors yields, and its error.
func collect[T any](seq func(func(T, error) bool)) (values []T, err error) {
	for v, err := range seq {
		if err != nil {
			return values, err
		}
		values = append(values, v)
	}
	return values, nil
}

// wantError fails the test unless err says want.
func wantError(t *testing.T, what string, err error, want string) {
	t.Helper()
	if fmt.Sprint(err) != want {
		t.Errorf("%s\n got %v\nwant %v", what, err, want)
	}
}
