// Preparing the directory on which the tree is mounted.

package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links the last part of a path may lead through.
const maxLinks = 40

// answerTime is how long a mount that is in our way may take to show that it is
// alive.
const answerTime = 2 * time.Second

// prepare makes dir ready to be mounted on and returns its absolute path
// without symbolic links.
func prepare(ctx context.Context, dir string, create bool) (string, error) {
	path, err := resolve(dir)
	if err != nil {
		return "", fmt.Errorf("mount point %s: %w", dir, err)
	}
	if err := clearStale(ctx, path); err != nil {
		return "", err
	}
	if create {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return "", fmt.Errorf("make mount point: %w", err)
		}
	}
	return path, checkEmpty(path)
}

// resolve returns dir as an absolute path without symbolic links. It does not
// touch what is mounted on dir: that can be dead, or hang. What does not exist
// is left as it is.
func resolve(dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for range maxLinks {
		parent, err := filepath.EvalSymlinks(filepath.Dir(path))
		if errors.Is(err, fs.ErrNotExist) {
			return path, nil // to be created, or refused
		}
		if err != nil {
			return "", err
		}
		path = filepath.Join(parent, filepath.Base(path))
		if _, ok, err := mountAt(path); ok || err != nil {
			return path, err
		}
		target, err := os.Readlink(path)
		if err != nil {
			return path, nil // no link
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(parent, target)
		}
		path = target
	}
	return "", syscall.ELOOP
}

// checkEmpty fails unless path is an empty directory.
func checkEmpty(path string) error {
	d, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("mount point %s: %w", path, syscall.ENOENT)
	case err != nil:
		return fmt.Errorf("mount point: %w", err)
	}
	defer d.Close()
	switch _, err = d.Readdirnames(1); {
	case err == nil:
		return fmt.Errorf("mount point %s: %w", path, syscall.ENOTEMPTY)
	case err != io.EOF:
		return fmt.Errorf("mount point %s: %w", path, err)
	}
	return nil
}

// clearStale detaches the trees on path that nobody serves any more. A tree that
// is alive is an error (EBUSY), and so is a mount of another kind that is dead or
// does not answer: it is not ours to clear.
func clearStale(ctx context.Context, path string) error {
	for {
		m, ok, err := mountAt(path)
		if err != nil || !ok {
			return err
		}
		err = answers(ctx, path)
		switch {
		case m.fsType != fsType && err == nil:
			return nil // to mount over it is to hide it: it must be empty
		case m.fsType != fsType:
			return fmt.Errorf("mount point %s has a mount of type %s: %w", path, m.fsType, err)
		case !errors.Is(err, syscall.ENOTCONN):
			return fmt.Errorf("mount point %s: another blksnap is mounted there: %w", path, syscall.EBUSY)
		}
		if err := unmount(ctx, path, detach); err != nil {
			return fmt.Errorf("clear the stale mount on %s: %w", path, err)
		}
	}
}

// answers returns nil if what is mounted on path is alive, ENOTCONN if it is
// dead, and ETIMEDOUT if it does not say within answerTime.
func answers(ctx context.Context, path string) error {
	return inTime(ctx, func() error {
		if _, err := os.Stat(path); err != nil {
			return err
		}
		// The kernel may have answered that itself, from what it remembers of a
		// process that is gone. This it always passes on.
		if err := unix.Statfs(path, new(unix.Statfs_t)); errors.Is(err, syscall.ENOTCONN) {
			return err
		}
		return nil // also of a mount that has no answer to it
	})
}

// inTime calls ask and returns what it says, or ETIMEDOUT after answerTime.
func inTime(ctx context.Context, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	answer := make(chan error, 1)
	go func() { answer <- ask() }()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return fmt.Errorf("it does not answer: %w", syscall.ETIMEDOUT)
	}
}
