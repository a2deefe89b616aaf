// The command that is run when the snapstore runs low.

package control

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"blksnap/store"
)

// runOnLow has the command of --on-store-low run each time that the snapstore
// runs low, one at a time. The command ends with the daemon.
func (s *service) runOnLow() {
	if s.set.onStoreLow == "" {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var turn sync.Mutex
	s.daemon.setOnLow(func(l store.LowSpace) {
		running.Go(func() {
			turn.Lock()
			defer turn.Unlock()
			if out, err := s.lowCommand(ctx, l).CombinedOutput(); err != nil && ctx.Err() == nil {
				s.log.Warn("run --on-store-low", "err", err, "output", clip(string(out)))
			}
		})
	})
	s.later(func() error {
		s.daemon.setOnLow(nil)
		cancel()
		running.Wait()
		return nil
	})
}

func (d *Daemon) setOnLow(f func(store.LowSpace)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.onLow = f
}

// lowCommand is the command with the figures in its environment.
func (s *service) lowCommand(ctx context.Context, l store.LowSpace) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-c", s.set.onStoreLow)
	cmd.WaitDelay = time.Second // for what it left behind with its output open
	left := ""
	if l.Left > 0 {
		left = strconv.FormatInt(int64(l.Left/time.Second), 10)
	}
	cmd.Env = append(os.Environ(),
		"BLKSNAP_CONTROL="+s.set.control,
		fmt.Sprintf("BLKSNAP_STORE_SIZE=%d", l.Size),
		fmt.Sprintf("BLKSNAP_STORE_FREE=%d", l.Free),
		fmt.Sprintf("BLKSNAP_STORE_RATE=%d", l.Rate),
		"BLKSNAP_STORE_LEFT="+left,
	)
	return cmd
}
