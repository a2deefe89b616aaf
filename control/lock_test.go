package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestLockOfRunningDaemon asks for the lock of a daemon that answers: it is
// refused at once, not after the time for one that stops.
func TestLockOfRunningDaemon(t *testing.T) {
	dir := t.TempDir()
	d := newTestDaemon(t)
	holdLock(t, dir, serveTest(t, d).path)
	start := time.Now()
	_, err := lockDir(t.Context(), dir, "", time.Hour)
	wantError(t, "lock of a running daemon", err, fmt.Sprintf("lock directory %s: in use by another blksnap, process %d", dir, os.Getpid()))
	if took := time.Since(start); !errors.Is(err, syscall.EBUSY) || took > time.Minute {
		t.Errorf("lock of a running daemon\n got %v after %v\nwant %v at once", err, took, syscall.EBUSY)
	}
}

// TestLockOfStoppingDaemon asks for the lock of a daemon that is stopping, and
// gets it when that is gone.
func TestLockOfStoppingDaemon(t *testing.T) {
	dir := t.TempDir()
	d := newTestDaemon(t)
	held := holdLock(t, dir, serveTest(t, d).path)
	d.stop()

	got := make(chan error, 1)
	go func() {
		l, err := lockDir(t.Context(), dir, "/control", time.Hour)
		if err == nil {
			err = l.unlock()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("lock that is held\n got %v\nwant to wait", err)
	case <-time.After(3 * lockRetry):
	}
	if err := held.unlock(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("lock after the other has gone: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "lock"))
	if want := fmt.Sprintf("%d /control\n", os.Getpid()); string(text) != want || err != nil {
		t.Errorf("lock file\n got %q, %v\nwant %q", text, err, want)
	}
}

func TestLockGivesUp(t *testing.T) {
	for _, tc := range []struct {
		name  string
		text  string // of the lock file
		want  error
		setup func(context.Context) (context.Context, context.CancelFunc)
	}{
		{"at the deadline", "12345 /nonexistent", syscall.EBUSY, context.WithCancel},
		{"not knowing who holds it", "", syscall.EBUSY, context.WithCancel},
		{"when told to stop", "12345 /nonexistent", context.Canceled, func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx, cancel
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			l := holdLock(t, dir, "")
			if err := l.write(tc.text); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := tc.setup(t.Context())
			defer cancel()
			if _, err := lockDir(ctx, dir, "", 2*lockRetry); !errors.Is(err, tc.want) {
				t.Errorf("lock that stays held\n got %v\nwant %v", err, tc.want)
			}
		})
	}
}

// TestLockIsNoLink refuses a lock file that leads elsewhere: it would be
// written to.
func TestLockIsNoLink(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, filepath.Join(dir, "lock")); err != nil {
		t.Fatal(err)
	}
	_, err := lockDir(t.Context(), dir, "", 0)
	if text, _ := os.ReadFile(victim); !errors.Is(err, syscall.ELOOP) || string(text) != "precious" {
		t.Errorf("lock through a symbolic link\n got %v, file is %q\nwant %v, file as it was", err, text, syscall.ELOOP)
	}
}

// holdLock takes the lock of dir until the test ends.
func holdLock(t *testing.T, dir, control string) *dirLock {
	t.Helper()
	l, err := lockDir(t.Context(), dir, control, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.unlock() })
	return l
}
