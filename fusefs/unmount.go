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
// is still open then gets errors. It returns after ctx is done at the latest: an
// error then says what still runs. Further calls, and one after somebody else
// unmounted the tree, only wait.
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
		mounted, err := t.mounted()
		if err != nil || !mounted {
			break
		}
		err = unmount(ctx, t.dir, gentle)
		if err == nil {
			break
		}
		if time.Now().After(end) || ctx.Err() != nil {
			t.log.Warn("the tree is still in use and is taken away", "dir", t.dir)
			if err := unmount(ctx, t.dir, detach); err != nil {
				return err
			}
			break
		}
	}
	select {
	case <-t.done:
		return nil
	case <-time.After(grace):
		// A file is still open, or another mount namespace has the tree.
		return t.abort()
	}
}

// mounted says whether the topmost mount on the directory is this tree, and not
// one that somebody mounted after ours was gone.
func (t *Tree) mounted() (bool, error) {
	m, ok, err := mountAt(t.dir)
	return ok && m.dev == t.dev, err
}

// abort ends the connection to the kernel: all that use it get errors.
func (t *Tree) abort() error {
	_, minor, _ := strings.Cut(t.dev, ":")
	err := os.WriteFile("/sys/fs/fuse/connections/"+minor+"/abort", []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		select {
		case <-t.done: // it ended by itself meanwhile
			return nil
		default:
		}
	}
	return err
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
	out, err := exec.CommandContext(ctx, "fusermount3", append(args, "--", path)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
