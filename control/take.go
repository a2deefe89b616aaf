// Taking a snapshot with what goes around it: commands for guests and databases,
// and frozen file systems. All of that is done by who asks, not by the daemon.

package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Taking says how a snapshot is to be taken.
type Taking struct {
	SnapshotRequest
	Freeze []string // mount points of file systems to freeze around the instant
	Before string   // shell command to run before; the snapshot is not taken if it fails
	After  string   // shell command to run after, whatever happened
}

// Take takes a snapshot. When it returns, frozen file systems are thawed and After
// has run, also if ctx has ended; and so it is when we are killed. The snapshot is destroyed again where its file
// systems were not frozen all the time, but it stays where only After fails, and is returned beside the error.
func (c *Client) Take(ctx context.Context, t Taking) (v SnapshotInfo, err error) {
	for i, m := range t.Freeze {
		if t.Freeze[i], err = filepath.Abs(m); err != nil {
			return v, fmt.Errorf("find %s: %w", m, err)
		}
	}
	if len(t.Freeze) > 0 {
		if err := c.call(ctx, "POST", "/freeze", FreezeRequest{t.Freeze}, nil); err != nil {
			return v, err
		}
	}
	if t.After != "" {
		after, failed := runAfter(t.After)
		if failed != nil {
			return v, failed
		}
		defer func() { err = errors.Join(err, after()) }()
	}
	if t.Before != "" {
		if err := runBefore(ctx, t.Before); err != nil {
			return v, err
		}
	}
	return c.takeFrozen(ctx, t)
}

func (c *Client) takeFrozen(ctx context.Context, t Taking) (v SnapshotInfo, err error) {
	if len(t.Freeze) == 0 {
		return c.TakeSnapshot(ctx, t.SnapshotRequest)
	}
	thaw, err := startFreezer(t.Freeze)
	if err != nil {
		return v, err
	}
	v, err = c.TakeSnapshot(ctx, t.SnapshotRequest)
	thawed := thaw()
	if err != nil || thawed == nil {
		return v, errors.Join(err, thawed)
	}
	if err := c.DestroySnapshots(context.WithoutCancel(ctx), []string{v.Name}, true); err != nil {
		return v, errors.Join(err, thawed)
	}
	return SnapshotInfo{}, thawed
}

func runBefore(ctx context.Context, command string) error {
	cmd := shell(ctx, command)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("--before %q: %w", command, err)
	}
	return nil
}

// shell is a command of the user's. What it prints goes to stderr: stdout is for the
// snapshot's name.
func shell(ctx context.Context, command string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	return cmd
}
