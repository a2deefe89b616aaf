// Locks of the run and the state directory: one daemon for each.

package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// stopWait is how long a start waits for a daemon that is still stopping,
	// or that was killed and whose last thread is still writing.
	stopWait = 10 * time.Second

	// lockRetry is how often it tries.
	lockRetry = 50 * time.Millisecond
)

// dirLock is the lock of a directory: the file `lock` in it, locked by flock,
// so that it falls by itself when the last thread of its process is gone. The
// file says who holds it: "PID CONTROL-SOCKET".
type dirLock struct{ f *os.File }

// lockDir takes the lock of dir for the daemon whose control socket is or will
// be at control. It waits up to wait for a holder that stops or has died; one
// that still answers its control socket is an error at once.
func lockDir(ctx context.Context, dir, control string, wait time.Duration) (*dirLock, error) {
	l, err := openLock(dir)
	if err != nil {
		return nil, err
	}
	return l.take(ctx, dir, control, wait, func() {})
}

// openLock opens the lock of dir, to be taken.
func openLock(dir string) (*dirLock, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	return &dirLock{f}, nil
}

// take is lockDir for the lock of dir, which is closed where it cannot be had. It calls alive
// whenever the disk has answered.
func (l *dirLock) take(ctx context.Context, dir, control string, wait time.Duration, alive func()) (*dirLock, error) {
	err := l.wait(ctx, time.Now().Add(wait), alive)
	if err == nil {
		err = l.write(fmt.Sprintf("%d %s\n", os.Getpid(), control))
	}
	if err != nil {
		l.f.Close()
		return nil, fmt.Errorf("lock directory %s: %w", dir, err)
	}
	return l, nil
}

// wait takes the lock as soon as it falls. It gives up at the deadline, when ctx
// ends, or when a daemon answers that is not going to let it go.
func (l *dirLock) wait(ctx context.Context, deadline time.Time, alive func()) error {
	for {
		if alive(); ctx.Err() != nil {
			return ctx.Err()
		}
		err := syscall.Flock(int(l.f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		pid, serving := l.holder(ctx)
		if serving || time.Now().After(deadline) {
			return refuse(syscall.EBUSY, "in use by another blksnap, process %s", cmp.Or(pid, "not known"))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockRetry):
		}
	}
}

// holder says which process holds the lock, as far as the file tells, and
// whether a daemon that is not stopping answers for it.
func (l *dirLock) holder(ctx context.Context) (pid string, serving bool) {
	pid, control, ok := l.read()
	if !ok {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	v, err := NewClient(control).Version(ctx)
	return pid, err == nil && !v.Stopping
}

// read returns what write wrote.
func (l *dirLock) read() (pid, control string, ok bool) {
	buf := make([]byte, 4096)
	n, _ := l.f.ReadAt(buf, 0) // what cannot be read is a holder that is not known
	text, _, _ := strings.Cut(string(buf[:n]), "\n")
	return strings.Cut(text, " ")
}

func (l *dirLock) write(text string) error {
	// In this order it takes no new space on a disk that is full.
	if _, err := l.f.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	return l.f.Truncate(int64(len(text)))
}

// keep leaves the lock to the end of the process, by a descriptor that nothing else
// closes.
func (l *dirLock) keep() error {
	_, err := unix.FcntlInt(l.f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return err
}

// unlock gives the lock back. The file stays: removing it would let two
// daemons lock two different files of that name.
func (l *dirLock) unlock() error { return l.f.Close() }
