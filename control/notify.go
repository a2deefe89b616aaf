// Messages to systemd, where it started us: sd_notify(3).

package control

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notify sends one message. Without a service manager it does nothing; one
// that cannot be reached is no reason not to serve.
func notify(log *slog.Logger, message string) {
	if _, err := daemon.SdNotify(false, message); err != nil {
		log.Warn("notify the service manager", "message", message, "err", err)
	}
}

// watchdog tells the service manager that we are alive, twice in the time
// after which it would kill us, until ctx ends. alive must return for that: it
// takes the locks that every request takes.
func watchdog(ctx context.Context, log *slog.Logger, alive func()) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("read what the watchdog expects", "err", err)
	}
	if limit <= 0 {
		return
	}
	tick := time.NewTicker(limit / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			alive()
			notify(log, daemon.SdNotifyWatchdog)
		}
	}
}
