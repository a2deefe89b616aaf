// Unmounting, also what does not want to go.

package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long a stop waits for files that are just being closed, before
// it takes the tree away from who has it open.
const grace = 200 * time.Millisecond

// How unmount goes about it.
const (
	gentle = 0               // only if nothing is open
	detach = unix.MNT_DETACH // take the name away, whatever is open
)

// Unmount unmounts the tree and waits until no request is served any more. What
// is still open then gets errors. It returns after ctx is done at the latest,
// with an error if requests are still being served: because the Source does not
// return from one, or because files are open that we have no right to take away.
// They end with this process. Further calls, and one after somebody else
// unmounted the tree, only wait; one after somebody cut its connection clears the
// dead mount.
func (t *Tree) Unmount(ctx context.Context) error {
	if err := t.leave(ctx); err != nil {
		return fmt.Errorf("unmount %s: %w", t.dir, err)
	}
	served := make(chan struct{})
	go func() {
		t.serving.Wait()
		close(served)
	}()
	select {
	case <-served:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("unmount %s: requests are still being served: %w", t.dir, ctx.Err())
	}
}

// leave takes the mount away and makes the kernel end the connection.
func (t *Tree) leave(ctx context.Context) error {
	for end := time.Now().Add(grace); ; time.Sleep(grace / 20) {
		ours, merr := t.mounted(ctx)
		if merr != nil || !ours {
			break
		}
		if unmount(ctx, t.dir, gentle) == nil {
			break
		}
		if time.Now().After(end) || ctx.Err() != nil {
			t.log.Warn("the tree is still in use and is taken away", "dir", t.dir)
			return t.takeAway(ctx)
		}
	}
	select {
	case <-t.done:
		return nil
	case <-time.After(grace):
		// Somebody else detached it with a file open, or another mount
		// namespace has it, too.
		return t.abort()
	}
}

// mounted says whether what is mounted on the directory is this tree, and not
// one that somebody mounted there after ours was gone. That can have the same
// device number, but it is alive when ours is done.
func (t *Tree) mounted(ctx context.Context) (bool, error) {
	m, ok, err := mountAt(t.dir)
	if err != nil || !ok || m.dev != t.dev {
		return false, err
	}
	select {
	case <-t.done:
		return errors.Is(answers(ctx, t.dir), unix.ENOTCONN), nil
	default:
		return true, nil
	}
}

// takeAway unmounts what is in use.
func (t *Tree) takeAway(ctx context.Context) error {
	if err := unmount(ctx, t.dir, detach); err != nil {
		return err
	}
	return t.abort()
}

// abort ends the connection to the kernel: all that use it get errors.
func (t *Tree) abort() error {
	err := abort(t.dev)
	select {
	case <-t.done:
		return nil // it has ended, by this or by itself
	default:
	}
	if err != nil {
		return fmt.Errorf("its files are open and stay so until this process ends: %w", err)
	}
	return nil
}

// AbortUnserved ends the connection of a tree on dir that does not answer, and says
// whether it did. It is for who knows that the process pid was killed: where a thread of
// that waits for an answer of its own tree, which cannot be interrupted, it keeps the
// connection alive, all that it has locked, and itself. A tree that answers, one that is
// dead already, that of another process, and what is not a tree are left as they are. It
// takes answerTime at most.
func AbortUnserved(ctx context.Context, dir string, pid int) (done bool, err error) {
	path, err := resolve(dir)
	if err != nil {
		return false, err
	}
	m, ok, err := mountAt(path)
	if err != nil || !ok || m.fsType != fsType {
		return false, err
	}
	// Not Stat, which the kernel may answer from what it remembers.
	err = inTime(ctx, func() error { return unix.Statfs(path, new(unix.Statfs_t)) })
	if !errors.Is(err, unix.ETIMEDOUT) || ctx.Err() != nil {
		return false, nil
	}
	if !mayServe(pid, m.dev) {
		return false, nil // it is only slow
	}
	return true, abort(m.dev)
}

// abort ends the connection that the mount with this device number has. It is
// ended by a file in the fusectl file system; who is privileged needs not have
// that mounted.
func abort(dev string) error {
	_, minor, _ := strings.Cut(dev, ":")
	control := unix.AT_FDCWD
	name := "/sys/fs/fuse/connections/" + minor + "/abort"
	if os.Geteuid() == 0 {
		fd, err := fusectl()
		if err != nil {
			return fmt.Errorf("open fusectl: %w", err)
		}
		defer unix.Close(fd)
		control, name = fd, minor+"/abort"
	}
	fd, err := unix.Openat(control, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("1"))
	return err
}

// fusectl returns a file descriptor of the fusectl file system, mounted nowhere.
func fusectl() (int, error) {
	config, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(config)
	if err := unix.FsconfigCreate(config); err != nil {
		return -1, err
	}
	return unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, 0)
}

// unmount unmounts what is on path, by fusermount3 where we are not privileged.
func unmount(ctx context.Context, path string, how int) error {
	if os.Geteuid() == 0 {
		return unix.Unmount(path, how|unix.UMOUNT_NOFOLLOW)
	}
	args := []string{"-u"}
	if how == detach {
		args = append(args, "-z")
	}
	return complain(exec.CommandContext(ctx, "fusermount3", append(args, "--", path)...))
}
